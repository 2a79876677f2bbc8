"""Everything worth measuring on a GPU, in one call on a machine that has one for half an hour and no network."""
