"""How channels flow through a network: what each layer and function does to them, and what follows for the whole.

``ops`` is the table of layers and functions, ``norms`` knows the batch norms, ``graph`` is a network as operations on
channels, ``classes`` says which channels go together, ``liveness`` which ones are read.
"""
