"""How a run is trained. Two configs whose decisive fields are equal end with the same bits.

A config comes from a recipe and overrides, and is stored in the run record. Its format has a number: a config that an
older nightshift has stored is read as a config of today.
"""
