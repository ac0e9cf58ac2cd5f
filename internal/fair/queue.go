package fair

import (
	priorities "container/heap"
	"container/list"
	"iter"
	"maps"
	"net/netip"
)

// A Queue holds values that belong to addresses. It keeps the values of each address in the order of their arrival, and
// knows which address has the most: a full store that drops those first lets no address push out the values of an address
// that has fewer. The zero value is an empty queue. A Queue is not safe for concurrent use.
type Queue[T any] struct {
	owners map[netip.Prefix]*owner[T]
	heap   ownerHeap[T]
	size   int
	pushed uint64 // how many values were ever pushed
}

// An owner is an address that has at least one value in a queue.
type owner[T any] struct {
	address netip.Prefix
	items   list.List // of *Item[T], the oldest first
	index   int       // in the heap
}

// An Item is a value in a Queue.
type Item[T any] struct {
	Value T

	order   uint64 // the item's place among all that were ever pushed
	owner   *owner[T]
	element *list.Element // in owner.items; nil once removed
}

// Push adds v as the newest value of an address. It returns the item for Remove.
func (q *Queue[T]) Push(address netip.Prefix, v T) *Item[T] {
	o := q.owners[address]
	if o == nil {
		if q.owners == nil {
			q.owners = map[netip.Prefix]*owner[T]{}
		}
		o = &owner[T]{address: address}
		q.owners[address] = o
	}
	q.pushed++
	q.size++
	item := &Item[T]{Value: v, order: q.pushed, owner: o}
	item.element = o.items.PushBack(item)
	if o.items.Len() == 1 {
		priorities.Push(&q.heap, o)
	} else {
		priorities.Fix(&q.heap, o.index)
	}
	return item
}

// Remove takes item out of the queue. It does nothing if item is out already.
func (q *Queue[T]) Remove(item *Item[T]) {
	if item.element == nil {
		return
	}
	o := item.owner
	o.items.Remove(item.element)
	item.element = nil
	q.size--
	if o.items.Len() == 0 {
		priorities.Remove(&q.heap, o.index)
		delete(q.owners, o.address)
	} else {
		priorities.Fix(&q.heap, o.index)
	}
}

// Largest returns the address with the most values, and the oldest of them. If several addresses have as many, it is the
// one whose oldest value is the oldest. If the queue is empty, oldest is nil.
func (q *Queue[T]) Largest() (address netip.Prefix, oldest *Item[T]) {
	if len(q.heap) == 0 {
		return netip.Prefix{}, nil
	}
	return q.heap[0].address, q.heap[0].oldest()
}

// Oldest returns the oldest value of an address, or nil if the address has none.
func (q *Queue[T]) Oldest(address netip.Prefix) *Item[T] {
	if o := q.owners[address]; o != nil {
		return o.oldest()
	}
	return nil
}

// Len returns the number of values in the queue.
func (q *Queue[T]) Len() int { return q.size }

// Count returns the number of an address's values.
func (q *Queue[T]) Count(address netip.Prefix) int {
	if o := q.owners[address]; o != nil {
		return o.items.Len()
	}
	return 0
}

// OwnerCount returns the number of addresses that have values.
func (q *Queue[T]) OwnerCount() int { return len(q.owners) }

// Owners returns the addresses that have values, in no order. The loop over them may remove values.
func (q *Queue[T]) Owners() iter.Seq[netip.Prefix] { return maps.Keys(q.owners) }

func (o *owner[T]) oldest() *Item[T] { return o.items.Front().Value.(*Item[T]) }

// An ownerHeap has on top the owner that Largest returns. It implements heap.Interface.
type ownerHeap[T any] []*owner[T]

// Len implements sort.Interface.
func (h ownerHeap[T]) Len() int { return len(h) }

// Less implements sort.Interface.
func (h ownerHeap[T]) Less(i, j int) bool {
	if n, m := h[i].items.Len(), h[j].items.Len(); n != m {
		return n > m
	}
	return h[i].oldest().order < h[j].oldest().order
}

// Swap implements sort.Interface.
func (h ownerHeap[T]) Swap(i, j int) {
	h[i], h[j] = h[j], h[i]
	h[i].index, h[j].index = i, j
}

// Push implements heap.Interface.
func (h *ownerHeap[T]) Push(x any) {
	o := x.(*owner[T])
	o.index = len(*h)
	*h = append(*h, o)
}

// Pop implements heap.Interface.
func (h *ownerHeap[T]) Pop() any {
	old := *h
	last := len(old) - 1
	o := old[last]
	old[last] = nil
	*h = old[:last]
	return o
}
