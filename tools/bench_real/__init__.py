"""Measures regraft on real pairs of base versions that are inside packages; see README.md."""
