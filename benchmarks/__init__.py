"""Commands that measure: each prints a table and leaves a JSON record in results/."""
