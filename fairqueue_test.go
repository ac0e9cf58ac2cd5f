package chatbroadcast

import (
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"
)

// numberedPrefix returns one of many addresses.
func numberedPrefix(i int) netip.Prefix {
	return netip.PrefixFrom(netip.AddrFrom4([4]byte{10, byte(i >> 16), byte(i >> 8), byte(i)}), 32)
}

// testPrefix returns one of 256 addresses.
func testPrefix(i int) netip.Prefix {
	return netip.PrefixFrom(netip.AddrFrom4([4]byte{127, 0, 0, byte(i)}), 32)
}

func TestFairQueue_LargestOwnerLosesItsOldestFirst(t *testing.T) {
	var q fairQueue[string]
	for _, v := range []string{"a1", "b1", "a2", "a3", "b2", "c1"} {
		q.push(testPrefix(int(v[0])), v)
	}
	var got []string
	for q.len() > 0 {
		owner, item := q.largest()
		if item != q.oldest(owner) {
			t.Errorf("the largest owner's value is %s, its oldest is %s", item.value, q.oldest(owner).value)
		}
		got = append(got, item.value)
		q.remove(item)
		q.remove(item) // does nothing
	}
	if want := []string{"a1", "b1", "a2", "a3", "b2", "c1"}; !slices.Equal(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
	if _, item := q.largest(); item != nil || q.oldest(testPrefix('a')) != nil || len(q.owners) != 0 {
		t.Error("an empty queue has values")
	}
}

// TestFairQueue_AgreesWithAPlainList compares a queue with a list that it searches.
func TestFairQueue_AgreesWithAPlainList(t *testing.T) {
	random := rand.New(rand.NewPCG(1, 2))
	var q fairQueue[int]
	var items []*fairItem[int]
	for i := range 20_000 {
		if len(items) == 0 || random.IntN(5) > 1 && len(items) < 200 {
			items = append(items, q.push(testPrefix(random.IntN(10)), i))
		} else {
			at := random.IntN(len(items))
			q.remove(items[at])
			items = slices.Delete(items, at, at+1)
		}
		counts, oldest := map[netip.Prefix]int{}, map[netip.Prefix]*fairItem[int]{}
		for _, item := range items {
			owner := item.owner.prefix
			if counts[owner]++; counts[owner] == 1 {
				oldest[owner] = item
			}
		}
		var want *fairItem[int]
		for owner, item := range oldest {
			if q.count(owner) != counts[owner] || q.oldest(owner) != item {
				t.Fatalf("step %d: owner %v has %d values, want %d", i, owner, q.count(owner), counts[owner])
			}
			n, most := counts[owner], 0
			if want != nil {
				most = counts[want.owner.prefix]
			}
			if n > most || n == most && item.value < want.value {
				want = item
			}
		}
		if _, got := q.largest(); got != want || q.len() != len(items) {
			t.Fatalf("step %d: largest is %+v among %d, want %+v among %d", i, got, q.len(), want, len(items))
		}
	}
}
