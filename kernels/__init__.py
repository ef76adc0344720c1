"""What is computed: one folder per operation, all its versions side by side."""
