"""Experiments on what each part of the pipeline does, their raw numbers and figures; docs/results.md is the page."""
