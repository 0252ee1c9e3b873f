"""What commands show: facts and edits, answers, what an input holds."""
