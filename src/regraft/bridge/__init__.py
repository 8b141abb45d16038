"""The old base kept beside the new one, at sampling time, for adapters that no map of weights carries.

Nothing is trained: what the adapter does to the old base's outputs is added to the new base's. See docs/bridge.md.
The modules import transformers and diffusers, so they are named in full: `regraft.bridge.logits.LogitBridge` and
`regraft.bridge.delta.DeltaPipeline`.
"""
