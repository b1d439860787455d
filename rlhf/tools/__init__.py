"""Commands around runs: what makes a model to start from, and what looks at one that is there."""
