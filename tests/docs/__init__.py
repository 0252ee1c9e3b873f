"""What makes the pages that are not written by hand: results, and the picture of the terminal."""
