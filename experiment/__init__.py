"""Which of the paper's claims hold on the scale model: README.md has question, rows, rules."""
