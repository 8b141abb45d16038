"""Bottleneck adapters by AdapterHub's own library, for tests."""
