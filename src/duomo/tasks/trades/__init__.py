"""Domains that the embedded model was never trained on: what the adapters of examples/ learn.

No name here stands in a share of the base's recipe (`train.recipe`); a test holds that.
"""
