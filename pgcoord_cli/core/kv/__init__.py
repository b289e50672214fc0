"""The transaction client, and the other readers and writers of the key-value data."""
