"""Tokenizers, policies and reward models by Hugging Face folder or id."""
