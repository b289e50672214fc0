"""Election, lease, and the resolver that decides commit requests."""
