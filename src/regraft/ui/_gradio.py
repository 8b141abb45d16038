"""Gradio, told before it is loaded to send nothing, and to keep what it is given where nobody else can read it."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile

__all__ = ["gr"]

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
# By default /tmp/gradio, which whoever uses this machine can read, and from which nothing is removed.
_KEPT = tempfile.mkdtemp(prefix="regraft-ui-")
atexit.register(shutil.rmtree, _KEPT, ignore_errors=True)
os.environ["GRADIO_TEMP_DIR"] = _KEPT

import gradio as gr  # noqa: E402
