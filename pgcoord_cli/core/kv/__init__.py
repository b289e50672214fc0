"""The transaction client and everything else that reads or writes the key-value data."""
