"""The four systems. Ten packages and two modules; imports between them run one way, and import-linter checks it."""
