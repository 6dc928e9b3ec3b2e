"""From raw interactions and items to the files that training reads."""
