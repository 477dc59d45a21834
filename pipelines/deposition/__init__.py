"""Files for publication and deposition: Table 1 and mmCIF."""
