package client

import (
	"cmp"
	"slices"
)

// ComparePositions orders the messages of one conversation as everybody sees them; use it with slices.SortFunc. A
// position of 0 is not known yet, as of one's own message before its receipt, and comes last.
func ComparePositions(a, b uint64) int {
	// 0 − 1 wraps to the largest number: the unknown sorts behind every position.
	return cmp.Compare(a-1, b-1)
}

// CompareMessages is ComparePositions for messages.
func CompareMessages(a, b Message) int { return ComparePositions(a.Position, b.Position) }

// sortItems puts sends in the order in which they were given.
func sortItems(items []Item) {
	slices.SortFunc(items, func(a, b Item) int { return cmp.Compare(a.Local, b.Local) })
}
