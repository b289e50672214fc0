"""The thin psycopg layer: connections and named statements. It knows nothing of what they mean."""
