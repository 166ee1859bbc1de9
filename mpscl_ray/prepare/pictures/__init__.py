"""A page of pictures of what was prepared or checked, cases unlike the others first."""
