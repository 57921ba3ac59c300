"""What a user could pick instead of MEM-DFA, to save memory."""
