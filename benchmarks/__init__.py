"""Speed, measured side by side on one server in one go, as ratios. Durability is on everywhere."""
