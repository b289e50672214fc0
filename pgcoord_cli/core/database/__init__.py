"""What every session needs: its settings, the schema and its migrations, rights, LISTEN, the pool."""
