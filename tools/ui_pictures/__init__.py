"""Screenshots of `regraft ui` for docs/ui.md, from a headless Chromium on the embedded demo."""
