"""The Triton backend: kernels, their launches and the table of configurations.

Nothing here is imported before the backend is named: CPU calls and machines without Triton do not pay for it.
"""
