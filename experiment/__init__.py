"""Which of the paper's claims hold on the scale model: README.md has the question, the rows and the rules."""
