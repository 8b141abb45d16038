"""The old base kept beside the new one, at sampling time, for plug-ins that no map of weights carries.

See docs/bridge.md. The modules import transformers and diffusers, so they are named in full:
`regraft.bridge.logits.LogitBridge`, `regraft.bridge.delta.DeltaPipeline`, and `regraft.bridge.x_adapter`'s
``pipeline.BridgePipeline`` and ``training.train_mapper``.
"""
