"""The scale model of the paper: what runs when no data is named, on any CPU."""
