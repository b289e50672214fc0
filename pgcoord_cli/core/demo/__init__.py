"""The demonstration: transfers while the leader is killed, and a flow whose worker is killed."""
