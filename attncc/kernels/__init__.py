"""From an attention to a callable kernel: passes, emitter, toolchain, and what is found out per call."""
