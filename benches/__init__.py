"""The speed-up study: frozen cases, peers, a correctness gate, timers and reports."""
