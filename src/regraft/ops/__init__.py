"""What makers do with adapters between trainings: convert, resize, merge, extract, diff. One file each."""

from __future__ import annotations

from regraft.ops.convert import convert_adapter
from regraft.ops.diff import diff_adapters
from regraft.ops.extract import extract_adapter
from regraft.ops.merge import merge_adapters
from regraft.ops.resize import resize_adapter

__all__ = ["convert_adapter", "diff_adapters", "extract_adapter", "merge_adapters", "resize_adapter"]
