package fair

import (
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"
)

// testAddress returns one of 256 addresses.
func testAddress(i int) netip.Prefix {
	return netip.PrefixFrom(netip.AddrFrom4([4]byte{127, 0, 0, byte(i)}), 32)
}

func TestQueue_LargestOwnerLosesItsOldestFirst(t *testing.T) {
	var q Queue[string]
	for _, v := range []string{"a1", "b1", "a2", "a3", "b2", "c1"} {
		q.Push(testAddress(int(v[0])), v)
	}
	var got []string
	for q.Len() > 0 {
		address, item := q.Largest()
		if item != q.Oldest(address) {
			t.Errorf("the largest owner's value is %s, its oldest is %s", item.Value, q.Oldest(address).Value)
		}
		got = append(got, item.Value)
		q.Remove(item)
		q.Remove(item) // does nothing
	}
	if want := []string{"a1", "b1", "a2", "a3", "b2", "c1"}; !slices.Equal(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
	if _, item := q.Largest(); item != nil || q.Oldest(testAddress('a')) != nil || q.OwnerCount() != 0 {
		t.Error("an empty queue has values")
	}
}

func TestQueue_LoopOverOwnersMayRemoveValues(t *testing.T) {
	var q Queue[int]
	for i := range 12 {
		q.Push(testAddress(i%4), i)
	}
	if got := q.OwnerCount(); got != 4 {
		t.Errorf("got %d owners, want 4", got)
	}
	owners := 0
	for address := range q.Owners() {
		owners++
		for item := q.Oldest(address); item != nil; item = q.Oldest(address) {
			q.Remove(item)
		}
	}
	if owners != 4 || q.Len() != 0 || q.OwnerCount() != 0 {
		t.Errorf("saw %d owners, left %d values of %d owners, want 4 seen and nothing left", owners, q.Len(), q.OwnerCount())
	}
}

// TestQueue_AgreesWithAPlainList compares a queue with a list that the test searches.
func TestQueue_AgreesWithAPlainList(t *testing.T) {
	random := rand.New(rand.NewPCG(1, 2))
	var q Queue[int]
	var items []*Item[int]
	for i := range 20_000 {
		if len(items) == 0 || random.IntN(5) > 1 && len(items) < 200 {
			items = append(items, q.Push(testAddress(random.IntN(10)), i))
		} else {
			at := random.IntN(len(items))
			q.Remove(items[at])
			items = slices.Delete(items, at, at+1)
		}
		counts, oldest := map[netip.Prefix]int{}, map[netip.Prefix]*Item[int]{}
		for _, item := range items {
			address := item.owner.address
			if counts[address]++; counts[address] == 1 {
				oldest[address] = item
			}
		}
		var want *Item[int]
		for address, item := range oldest {
			if q.Count(address) != counts[address] || q.Oldest(address) != item {
				t.Fatalf("step %d: address %v has %d values, want %d", i, address, q.Count(address), counts[address])
			}
			n, most := counts[address], 0
			if want != nil {
				most = counts[want.owner.address]
			}
			if n > most || n == most && item.Value < want.Value {
				want = item
			}
		}
		if _, got := q.Largest(); got != want || q.Len() != len(items) || q.OwnerCount() != len(counts) {
			t.Fatalf("step %d: largest is %+v among %d, want %+v among %d", i, got, q.Len(), want, len(items))
		}
	}
}
