"""The four systems and what serves them, one noun a file. No terminal here: verbs and frozen records only."""
