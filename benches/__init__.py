"""The speed-up study: frozen cases, variants, a correctness gate, timers and reports."""
