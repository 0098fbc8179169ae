"""The start of a run from the weights of a trained model.

`configs` builds the configuration of a run from a model, `weights` reads a model parameter by parameter, `rules`
converts parameters between architectures, `plan` decides where each parameter of a run comes from, and `model` builds
the model with which a run starts.
"""
