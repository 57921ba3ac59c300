"""The trainers: what a rule is, and the four of them; nothing here knows anything above."""
