"""What is wrong with the data, in one line."""


class DataError(ValueError):
    """One line on what is wrong with the data, naming the config key and the place."""
