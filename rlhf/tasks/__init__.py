"""Generated tasks: data from a grammar, and judges that know the truth."""
