"""What recipes share, one topic a module; no recipe imports a recipe."""
