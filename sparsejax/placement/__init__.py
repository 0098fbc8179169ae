"""Search of the layers of a trained model that keep their attention, without training.

`choices` says what a layer can become, `scores` measures a placement on held-out text, `search` looks for the best
placement within a budget, and `results` writes it.
"""
