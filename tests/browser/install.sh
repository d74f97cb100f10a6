#!/usr/bin/env bash
# Debian's Chromium, for root: the tests that open pages in a browser need it, and are skipped without it.
set -euo pipefail
if command -v chromium >/dev/null; then exit; fi
[[ "$(id -u)" == 0 ]] || exit 1
export DEBIAN_FRONTEND=noninteractive
install() { apt-get install -qq -y --no-install-recommends chromium >/dev/null 2>&1; }
install || { apt-get update -qq >/dev/null 2>&1 && install; }
