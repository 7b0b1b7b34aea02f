"""Questions that one noisy sum answers, each with how sure the answer is. See DESIGN.md."""
