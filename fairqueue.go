package chatbroadcast

import (
	priorities "container/heap"
	"container/list"
	"net/netip"
)

// A fairQueue holds values that belong to addresses, in the order of their arrival for each address. It knows which
// address has the most values, so that a full store drops those first and no address can push out the values of another
// that has fewer. The zero value is empty. It is not safe for concurrent use.
type fairQueue[T any] struct {
	owners map[netip.Prefix]*fairOwner[T]
	heap   fairHeap[T]
	size   int
	pushed uint64 // how many values were ever pushed
}

// A fairOwner is an address that has at least one value in the queue.
type fairOwner[T any] struct {
	prefix netip.Prefix
	items  list.List // of *fairItem[T], the oldest first
	index  int       // in the heap
}

// A fairItem is a value in a fairQueue.
type fairItem[T any] struct {
	value   T
	order   uint64 // the item's place among all that were ever pushed
	owner   *fairOwner[T]
	element *list.Element // in owner.items; nil when removed
}

// push adds v to the values of owner.
func (q *fairQueue[T]) push(owner netip.Prefix, v T) *fairItem[T] {
	o := q.owners[owner]
	if o == nil {
		if q.owners == nil {
			q.owners = map[netip.Prefix]*fairOwner[T]{}
		}
		o = &fairOwner[T]{prefix: owner}
		q.owners[owner] = o
	}
	q.pushed++
	q.size++
	item := &fairItem[T]{value: v, order: q.pushed, owner: o}
	item.element = o.items.PushBack(item)
	if o.items.Len() == 1 {
		priorities.Push(&q.heap, o)
	} else {
		priorities.Fix(&q.heap, o.index)
	}
	return item
}

// remove takes item out of the queue, unless it is out already.
func (q *fairQueue[T]) remove(item *fairItem[T]) {
	if item.element == nil {
		return
	}
	o := item.owner
	o.items.Remove(item.element)
	item.element = nil
	q.size--
	if o.items.Len() == 0 {
		priorities.Remove(&q.heap, o.index)
		delete(q.owners, o.prefix)
	} else {
		priorities.Fix(&q.heap, o.index)
	}
}

// largest returns the owner with the most values and the oldest of them, or nil if the queue is empty. Among owners with
// equally many it is the one whose oldest value is the oldest.
func (q *fairQueue[T]) largest() (owner netip.Prefix, oldest *fairItem[T]) {
	if len(q.heap) == 0 {
		return netip.Prefix{}, nil
	}
	return q.heap[0].prefix, q.heap[0].oldest()
}

// oldest returns the oldest value of owner, or nil if it has none.
func (q *fairQueue[T]) oldest(owner netip.Prefix) *fairItem[T] {
	if o := q.owners[owner]; o != nil {
		return o.oldest()
	}
	return nil
}

// len returns the number of values in the queue.
func (q *fairQueue[T]) len() int { return q.size }

// count returns the number of owner's values.
func (q *fairQueue[T]) count(owner netip.Prefix) int {
	if o := q.owners[owner]; o != nil {
		return o.items.Len()
	}
	return 0
}

func (o *fairOwner[T]) oldest() *fairItem[T] { return o.items.Front().Value.(*fairItem[T]) }

// A fairHeap has the owner on top that comes first in largest. It implements heap.Interface.
type fairHeap[T any] []*fairOwner[T]

// Len implements sort.Interface.
func (h fairHeap[T]) Len() int { return len(h) }

// Less implements sort.Interface.
func (h fairHeap[T]) Less(i, j int) bool {
	if n, m := h[i].items.Len(), h[j].items.Len(); n != m {
		return n > m
	}
	return h[i].oldest().order < h[j].oldest().order
}

// Swap implements sort.Interface.
func (h fairHeap[T]) Swap(i, j int) {
	h[i], h[j] = h[j], h[i]
	h[i].index, h[j].index = i, j
}

// Push implements heap.Interface.
func (h *fairHeap[T]) Push(x any) {
	o := x.(*fairOwner[T])
	o.index = len(*h)
	*h = append(*h, o)
}

// Pop implements heap.Interface.
func (h *fairHeap[T]) Pop() any {
	old := *h
	last := len(old) - 1
	o := old[last]
	old[last] = nil
	*h = old[:last]
	return o
}
