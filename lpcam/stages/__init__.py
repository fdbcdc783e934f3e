"""Each arrow of the flow, with the values that its result depends on.

A stage is a function of explicit arguments that looks its result up in the store and computes what
is missing. None knows of Hydra.
"""
