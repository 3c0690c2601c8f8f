"""The servers that answer: one module per protocol, one small class per brand."""
