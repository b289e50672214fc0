"""What `pgcoord demo` plays: transfers while the leader is killed, and a flow whose worker is killed."""
