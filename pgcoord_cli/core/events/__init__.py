"""The two outboxes, their tails, and the positions from which a tail resumes."""
