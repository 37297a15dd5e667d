"""What students typically get wrong: for each exercise answers that its graders must
reject, and one that they must not."""
